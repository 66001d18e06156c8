"""medgraft.training"""
