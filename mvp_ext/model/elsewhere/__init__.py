"""Models of others than timm: torchvision's, Hugging Face's, and users' own, behind the methods that timm's have.

Where a model comes from stands before the colon of its name (``Structure.architecture``): ``torchvision:resnet50``,
``transformers:ViTModel``, ``own:NAME``. A file says this name and a few named values, and nothing else (``arguments``).
"""
