"""Text in JSONL as tokens: what is trained on, calibrated on and measured with. Needs no extra."""
