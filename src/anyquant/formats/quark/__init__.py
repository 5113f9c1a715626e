"""AMD Quark's folder: what vLLM and SGLang load under `quant_method: quark`."""
