"""eora: eigenspace low-rank compensation of compressed language models.

The library under eoraflow's stages. It knows nothing of Snakemake and can be used by hand:

    solver        compression error + second moment -> nested low-rank factors (pure tensors)
    eigen         the largest eigenpairs of a matrix, directly or iterated and certified
    covariance    second moments of every decoder linear layer's input
    streaming     one decoder block at a time from a safetensors folder
    adapters      PEFT and packed low-bit adapter folders
    lowrank       the module that puts an adapter beside any (quantized) linear layer
    loading       original, compressed and compensated models, ready to run
    evaluation    lm-eval and perplexity on any of them
    config        what config.yaml means: checked, and turned into the variants to judge
    stages        each stage's folder and parameters, and which results a config asks for
    manifest      what a stage made, from what, and with what
    result        a stage's result: restored or filled, sealed, and published whole
    cards         which of a machine's GPUs a job takes
    nltk_data     what lm-eval's tasks ask of NLTK, kept beside the task
    store         finished results, kept so that an equal one is restored

Importing this package imports none of them; config, stages, manifest,
result and store need no torch.
"""
