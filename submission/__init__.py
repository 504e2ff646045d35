"What goes to Kaggle: see README.md here."
