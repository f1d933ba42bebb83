"""`lora2fx train`: a Hugging Face model, a table of examples and a method become a run folder."""
