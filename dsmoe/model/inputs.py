"""What of a batch goes into the model."""

from torch import Tensor


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's arguments out of a batch of the loader or of `evaluation_batches`.

    Labels and numbers of documents stay out. Where position_ids isolate documents, the attention mask stays out too:
    transformers reads packed documents off position_ids only without one, and padding stands at the end of a row, where
    no real token attends to it.
    """
    isolated = "position_ids" in batch
    left_out = {"shift_labels", "documents", *(("attention_mask",) if isolated else ())}
    return {key: value for key, value in batch.items() if key not in left_out}
