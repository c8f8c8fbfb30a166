"""What the workstation and the device must agree on to the bit: bundle, audio, log-mel, tokenizer."""
