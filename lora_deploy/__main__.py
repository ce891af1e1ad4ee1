"""`python -m lora_deploy`, and what `accelerate launch -m lora_deploy` starts in each process."""

from lora_deploy.cli import main

if __name__ == "__main__":
    main()
