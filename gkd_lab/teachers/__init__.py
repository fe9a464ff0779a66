"""Teachers: live models, cached scores, servers, models with another tokenizer."""
