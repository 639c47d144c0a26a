"""What coordinator and silos say to each other, and its bytes."""
