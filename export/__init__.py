"""What comes out: plan -> step programs -> ONNX artefact -> runtime. Never imports lightning; the runtime never imports torch."""
