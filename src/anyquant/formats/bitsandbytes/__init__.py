"""bitsandbytes: the Hugging Face folder of QLoRA (NF4, FP4) and LLM.int8."""
