"""Operations of the model, computed faster on CPUs (`cpu`) and GPUs (`gpu`)."""
