"""Who says what a student is compared with: models, kept scores, servers, readers of other tokens."""
