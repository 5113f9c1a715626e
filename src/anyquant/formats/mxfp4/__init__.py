"""The experts of gpt-oss under `quant_method: mxfp4`, which are read, not written."""
