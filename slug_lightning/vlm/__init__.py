"""Vision-language models of transformers: how they are asked, what they answer, and which tensors see."""
