"""eora: eigenspace low-rank compensation of compressed language models.

The library under eoraflow's stages. It knows nothing of Snakemake and can be used by hand:

    solver        compression error + second moment -> nested low-rank factors (pure tensors)
    covariance    second moments of every decoder linear layer's input
    streaming     one decoder block at a time from a safetensors folder
    adapters      PEFT and packed low-bit adapter folders
    lowrank       the module that puts an adapter beside any (quantized) linear layer
    loading       original, compressed and compensated models, ready to run
    evaluation    lm-eval and perplexity on any of them
    manifest      what a stage made, and publishing it without half-written results

Importing this package imports none of them; ``eora.config`` and ``eora.manifest`` need no torch.
"""
