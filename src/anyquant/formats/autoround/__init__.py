"""AutoRound: the layouts of GPTQ and AWQ under settings of its own, with any mixture of bits and group sizes."""
