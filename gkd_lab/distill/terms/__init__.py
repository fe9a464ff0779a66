"""What a loss is made of besides divergences of tokens: hidden layers, rewards, a discriminator, ULD."""
