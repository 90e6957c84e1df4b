"""The demo: six optimizers train the same small LLaMA on text found on this machine."""
