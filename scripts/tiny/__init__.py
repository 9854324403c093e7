"""The bundled model `tiny`: tokenizer, tasks, training forward, export and evaluation."""
