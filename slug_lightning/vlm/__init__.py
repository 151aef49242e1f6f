"""What is special about vision-language models of transformers."""
