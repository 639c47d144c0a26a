"""What all sides agree on before anything is sent: the plan, its roster, its tasks and the layout."""
