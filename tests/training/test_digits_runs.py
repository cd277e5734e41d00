"""The cache of encoded clips (the runs themselves: tests/test_train.py)."""

import jax.numpy as jnp
import numpy as np

from jvdiff.data import digits
from jvdiff.models import wan
from jvdiff.sharding import MeshShape, make_mesh
from jvdiff.training import digits_runs


def test_cached_latents_are_of_the_same_vae_and_clips_on_any_number_of_devices(tmp_path, monkeypatch):
    cfg = wan.VAEConfig(base_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    encode = lambda params, cfg, video: video[:, ::2, ::4, ::4, :1] * params["w"].reshape(1, 1, 1, 1, 4)  # noqa: E731
    monkeypatch.setattr(digits_runs.wan, "encode", encode)
    one, other = {"w": jnp.ones(4)}, {"w": jnp.full(4, 2.0)}

    def run(name, params, clips=20, seed=0, **axes):
        mesh = make_mesh(MeshShape(**axes))
        return digits_runs.encoded_clips(cfg, params, digits.batch, "", clips, seed, mesh, tmp_path / name)

    latents, prompts = run("a", one)
    np.testing.assert_array_equal(run("a", one)[0], latents)
    np.testing.assert_array_equal(run("b", one, fsdp=2, tensor=2)[0], latents)
    np.testing.assert_array_equal(run("a", other)[0], 2 * latents)  # not what was cached of another VAE
    assert len(run("a", one, clips=3)[0]) == 3 and list(run("a", one)[1]) == list(prompts)
    assert list(run("a", one, seed=1)[1]) != list(prompts)
