"""What is special about text-to-image pipelines of diffusers."""
