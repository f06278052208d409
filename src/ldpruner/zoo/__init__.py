"""Small trained pipelines that ship with the package, and the recipe that trained each."""
