"""Where to adapt: kinds, choices, costs, and the study."""
