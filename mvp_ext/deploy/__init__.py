"""Small models as files of other runtimes: ONNX, OpenVINO, and a torch program that needs torch alone."""
