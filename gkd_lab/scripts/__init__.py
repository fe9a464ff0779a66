"""One distillation run of a user's own pair and data, its model card, and models that go to the hub."""
