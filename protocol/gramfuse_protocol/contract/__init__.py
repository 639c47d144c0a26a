"""What all sides agree on before anything is sent: the plan, its roster and tasks, the layout."""
