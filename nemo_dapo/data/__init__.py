"""Problems in, tokenised prompts out: one data set a file, then template, filters, mixture, loader and curriculum."""
