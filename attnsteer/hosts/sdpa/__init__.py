"""Any module whose forward names F.scaled_dot_product_attention."""
