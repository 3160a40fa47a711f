"""What becomes of a trained adapter: stock LoRA, smaller ranks, files without PEFT."""
