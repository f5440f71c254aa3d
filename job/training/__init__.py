"""QLoRA training: the only room that imports torch, peft and bitsandbytes."""
