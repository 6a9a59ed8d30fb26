"""Commands about models of the Hugging Face hub."""
