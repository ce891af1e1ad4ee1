"""Pages for people: what was measured, as one HTML file that needs no network."""
