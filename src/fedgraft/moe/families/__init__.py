"""One file per Hugging Face `model_type` that departs from the experts contract of transformers; each exports FAMILY."""
