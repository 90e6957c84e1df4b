"""The demo: optimizers train the same small LLaMA on text found on this machine."""
