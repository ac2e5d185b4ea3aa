"""What a model is: its networks, its folder, its schedulers, the LoRAs on it."""
