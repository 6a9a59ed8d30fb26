"""Models of the Hugging Face hub: which files a model needs, and fetching them."""
