"""ASAM on one network of a GAN, the generator or the discriminator: handwritten digits, 8 x 8.

    python gan.py                          # ASAM on the discriminator
    python gan.py --perturb generator      # or on the generator, or on neither: none

What the closure of one network runs through belongs to the model that ASAM is given, and ``params`` says what is
perturbed: so buffers (batch norm, spectral norm) of both move once a step. Latent vectors are drawn before the closure,
so that both passes see the same. This shows the loop; that it makes better digits is no claim.

Printed, AMD EPYC, one thread, seed 0 (n = 1):
    ASAM on discriminator: energy distance to the real images 6.01 before, 0.586 after
    ASAM on generator: energy distance to the real images 6.01 before, 0.665 after
    ASAM on none: energy distance to the real images 6.01 before, 0.601 after
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from asam import ASAM  # ASAM

LATENT = 16


def networks():
    """A generator and a discriminator."""
    generator = nn.Sequential(nn.Linear(LATENT, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
    return generator, nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1))


def distance(a, b):
    """Energy distance of two sets of images: 0 for two samples of one distribution."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def train(perturb, rho, epochs, seed):
    """Energy distances of the generated images to the real ones, before and after training."""
    torch.manual_seed(seed)
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    generator, discriminator = networks()
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.99)) for net in (generator, discriminator)]
    both = nn.ModuleList([generator, discriminator])  # ASAM
    rhos = {"generator": 0, "discriminator": 0, perturb: rho}  # ASAM: with 0 it is one plain pass
    of_generator = ASAM(both, rho=rhos["generator"], params=generator.parameters())  # ASAM
    of_discriminator = ASAM(both, rho=rhos["discriminator"], params=discriminator.parameters())  # ASAM

    def generated(n=500):
        generator.eval()
        with torch.no_grad():
            samples = generator(torch.randn(n, LATENT))
        generator.train()
        return samples

    before = distance(generated(), images)
    for _ in range(epochs):
        for real in images[torch.randperm(len(images))].split(64):
            with torch.no_grad():
                fake = generator(torch.randn(len(real), LATENT))

            def discriminator_loss(real=real, fake=fake):
                return (
                    nn.functional.softplus(-discriminator(real)).mean()
                    + nn.functional.softplus(discriminator(fake)).mean()
                )

            optimizers[1].zero_grad()
            of_discriminator.backward(discriminator_loss)  # ASAM; was: discriminator_loss().backward()
            optimizers[1].step()

            latent = torch.randn(len(real), LATENT)

            def generator_loss(latent=latent):
                return nn.functional.softplus(-discriminator(generator(latent))).mean()

            optimizers[0].zero_grad()
            of_generator.backward(generator_loss)  # ASAM; was: generator_loss().backward()
            optimizers[0].step()
    return before, distance(generated(), images)


def main():
    """Train once and print the distances."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--perturb", choices=["generator", "discriminator", "none"], default="discriminator")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before, after = train(options.perturb, options.rho, options.epochs, options.seed)
    print(f"ASAM on {options.perturb}: energy distance to the real images {before:.2f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
