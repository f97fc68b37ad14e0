"""What is asked: examples, where they come from, and the prompts that ask them."""
