"""captionserve's server side: export, Triton models, gateway and command line."""
