"""Environment factories, one file for each family, and the vector environments that run them."""
