"""The terms of a loss: divergences, cross-entropy, hidden layers, rewards, a discriminator, ULD."""
