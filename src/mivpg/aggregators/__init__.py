"""What the paper compares MIVPG with, or builds on: other ways to turn a bag into visual prompts, a file a family."""
