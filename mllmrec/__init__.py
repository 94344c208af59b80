"""The library behind the stage scripts: files, models, generation, ranking, evaluation.

It imports none of the stage folders (`data_processing`, `Inference`, `MLLM-MSR`), so a second
system can use it in the same way.
"""
