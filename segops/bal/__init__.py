from .op import boundary_aware_loss, gaussian_edge, upsample_cross_entropy

__all__ = ["boundary_aware_loss", "gaussian_edge", "upsample_cross_entropy"]
