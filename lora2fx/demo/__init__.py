"""The main job from end to end on scikit-learn's digits: train, adapt, prune, fold, export, prove, report."""
