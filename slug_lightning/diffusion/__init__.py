"""What is particular to pipelines that draw: their parts, and how they are saved."""
