"""Recipes for exports: `lora-deploy recipes` says when to take which, `lora_deploy.recipes` reads them."""
