"""How the two small base models and their tokenizer are made."""
