"""NVIDIA ModelOpt's unified checkpoint: the folder that TensorRT-LLM, vLLM and SGLang load."""
